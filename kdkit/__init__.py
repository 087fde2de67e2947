"""kdkit distils a large causal language model into a small one. Start with the README and notebooks/."""

from kdkit.config import DistillConfig, load_config

__all__ = ["DistillConfig", "load_config"]
__version__ = "0.1.0"
