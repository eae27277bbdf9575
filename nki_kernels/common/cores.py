"""How work is shared by the cores of one launch (lnc 1 or 2).

Both cores of an lnc 2 launch run programs with the same instructions on other addresses, as the
hardware wants (docs/trainium2.md 1.6); what does not divide evenly is done by both, with the same
bits.
"""

import nki.language as nl


def this_core():
    """(index of this core, number of cores)."""
    return nl.program_id(0), nl.num_programs(0)


def share(count):
    """This core's part of `count` pieces of work: (first, number); of an odd count the piece in
    the middle is done by both."""
    core, cores = this_core()
    number = (count + cores - 1) // cores
    return min(core * number, count - number), number
