"""How work is shared by the cores of one launch (lnc 1 or 2)."""

import nki.language as nl


def share(count):
    """This core's part of `count` pieces of work: (first, number).

    Both cores of an lnc 2 launch do the same number, as the hardware wants equal programs
    (trainium2.md 1.6): of an odd count the one in the middle is done by both, with the same bits.
    """
    cores = nl.num_programs(0)
    number = (count + cores - 1) // cores
    return min(nl.program_id(0) * number, count - number), number
