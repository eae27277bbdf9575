"""What a NeuronCore-v3 is: sizes and limits, dtypes, memory regions."""
