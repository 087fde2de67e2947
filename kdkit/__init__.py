"""kdkit distils a large causal language model into a small one. Start with the README and notebooks/."""

from kdkit.command_line import load_config
from kdkit.config import DistillConfig

__all__ = ["DistillConfig", "load_config"]
__version__ = "0.1.0"
