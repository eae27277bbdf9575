"""What each NKI instruction computes, as pure NumPy functions.

No checks, no memory, no engines: the core loads operands, calls one function, and stores what it
returns. Conventions shared by all modules:

* Arithmetic operands are fp32 arrays ``[P, *free]`` (``dtypes.load_f32``); they may alias storage,
  so no function writes into an argument. Results are fp32; ``dtypes.store`` rounds them.
* Scalar operands are Python numbers or ``[P, 1]`` fp32 arrays, one value per partition.
* Two tensors of an instruction hold equal element counts per partition; their ranks may differ.
  The result has the shape of the first.
* "raw" means storage elements of any type, moved without looking at their value.
* Operator names are those of ``nki.language``: ``"add"``, ``"logical_shift_right"`` is
  ``"right_shift"``, and so on.
* Accumulator registers are fp32 arrays ``[P, 1]``, passed in and returned.
* Functions on the hot path take ``out``: an fp32 array of the result's shape, best the destination
  itself when it is a dense fp32 tile. It may become the result (then nothing is left to store) or
  stay unused; it may share memory with any operand.
* Infinities and NaN follow IEEE 754. Call under ``np.errstate(all="ignore")``: entering it once
  per kernel is cheaper than once per instruction.
"""
