"""`retrofit`: any decoder of Hugging Face transformers becomes a RETRO, in place. transformers is imported when it is
called; read api.py first, then attention.py, where the model's own attention meets the neighbours."""

from .api import RetrofitReport, retrofit

__all__ = ["RetrofitReport", "retrofit"]
