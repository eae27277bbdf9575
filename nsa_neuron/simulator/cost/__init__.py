"""Cycle model: from the record of a run to a modelled timeline. Never a measurement.

    run = simulate(kernel, data=False)(...)  ->  .run
    estimate = cost.estimate(simulated.run)        # low, central and high timelines
    estimate.central.total                         # ns
    estimate.band.low, .central, .high             # ns

`parameters` holds every constant with unit, source and band; `instructions` and `dma` say what one
instruction costs; `dependencies` who waits for whom; `schedule` when; `timeline` is the result.
"""
