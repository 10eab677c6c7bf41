"""One thin file per framework; none of them imports its framework before it is used."""

from .patch import patch_model, unpatch_model

__all__ = ["patch_model", "unpatch_model"]
