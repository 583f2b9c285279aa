"""What the integrations share: an engine made on first use, options under all their names, what of a model object can travel."""
