"""Names, roles and splits of the parameters of a model."""
