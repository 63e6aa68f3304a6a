"""One module per pass, named as the `kind` that recipes give it."""
