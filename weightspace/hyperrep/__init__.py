"""The hyper-representation: a transformer autoencoder over tokens, and its training."""
