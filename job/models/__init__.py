"""Networks by name, and weights files read without executing anything in them."""

from job.models.factory import NAMES, build, nominal_width
from job.models.sizes import MAX_SIZE

__all__ = ["MAX_SIZE", "NAMES", "build", "nominal_width"]
