"""Sparse adapters (He et al. 2022): scores, masks that hold through training, and the controls they are judged by."""
