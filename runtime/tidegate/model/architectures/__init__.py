"""One module per architecture, named exactly as the `model_type` of its `config.json`."""
