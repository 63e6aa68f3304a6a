"""Models as torch parameters, run by the same walk, and how they are trained."""
