__version__ = "0.0.1"

from . import affine, activations, attention, layernorm, gating, shortcuts  # each fills its part of the rule table
from .core import completeness_error, libra, rule
from .explain import Attribution, explain
from .gradient_maps import find_method, methods
from .ledger import Ledger, ledger, water_level
from .presets import only, without
from .tokens import contrast
