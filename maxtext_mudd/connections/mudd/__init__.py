"""MUDD, DenseFormer and DDFormer: weights of all earlier block outputs."""
