"""`nki.collectives`: groups of ranks."""

from dataclasses import dataclass

from ..tensor import NKIObject


@dataclass
class ReplicaGroup(NKIObject):
    """Groups of ranks that take part in a collective; groups do not overlap."""

    groups: list
