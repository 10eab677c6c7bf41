"""The output head of a model: statistics, temperature, the norm before it, calibration of tokens."""
