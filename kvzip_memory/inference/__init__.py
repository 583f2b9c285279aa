"""The one door to a transformers model: loading, forwards, batches of steps, sampling."""
