"""The vendor's `nki.compiler`, from NKI 0.7 on."""

from . import configuration as _configuration
from .remedies import Names as _Names

_versioned = _Names(
    __name__,
    AddressRotation=_configuration.AddressRotation,
    CompileConfig=_configuration.CompileConfig,
    SpecializationConfig=_configuration.SpecializationConfig,
)
__getattr__ = _versioned.__call__
__dir__ = _versioned.listed
