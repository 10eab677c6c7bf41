"""`patch_model`: a Hugging Face model trains on the smoothed loss, without its logits.

To read in this order: api.py (what users call), heads.py (which layers are the head), probe.py, probe_loss.py and
reads.py (what the model does with its logits and its loss, and what that depends on), patched.py (the class of a
patched model), loss_call.py (a forward under way), loss_head.py (the head, which computes the loss), stand_in.py (what
it gives in place of logits), forward.py (what the model returns); check.py compares a patched step with a dense one.
"""
