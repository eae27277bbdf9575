"""Scale on paper: memory, bytes and modelled time of a training step on meshes of many devices."""
