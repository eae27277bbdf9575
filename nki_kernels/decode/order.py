"""In which order the steps of some sequences stand in a program."""


def run_all(sequences):
    """All steps of some sequences, in an order in which each engine finds work while one waits.

    Keys of chosen blocks are waited for behind the next sequence's work, if SBUF has room for them.
    """
    last = len(sequences) - 1
    early = sequences[0].call.apart[1] > 0
    start(sequences[0])
    sequences[0].gather_values()
    sequences[0].far.score(0, len(sequences[0].far.tiles))
    sequences[0].score_near()
    if last > 0:
        start(sequences[1])
    for i in range(last + 1):
        own = sequences[i]
        own.start_ranking()
        for k in range(len(own.far.tiles)):
            if i < last:
                sequences[i + 1].far.score(k, 1)
            own.order(k)
        if early and i > 0:
            sequences[i - 1].chosen.score()
        own.rank()
        if i < last:
            sequences[i + 1].score_near()
        if i + 1 < last:
            start(sequences[i + 2])
        own.exponentiate()
        own.chosen.choose(own.ranked, own.place)
        if early and i > 0:
            finish(sequences[i - 1])
        own.chosen.find()
        if early:
            own.chosen.gather()
            if i < last:
                sequences[i + 1].gather_values()
        own.clear_values()
        own.weigh_far(0, len(own.far.tiles))
        own.weigh_near()
        own.add_known()
        if not early:
            own.chosen.gather()
            own.chosen.score()
            finish(own)
            if i < last:
                sequences[i + 1].gather_values()
    if early:
        sequences[last].chosen.score()
        finish(sequences[last])


def start(sequence):
    sequence.load()
    sequence.gather_keys()


def finish(sequence):
    sequence.chosen.add_up()
    sequence.store()
