"""What a model is: its architecture, the one forward walk, its weights and its bundle.

Nothing here runs a model or needs a tensor library beyond numpy. A backend implements `ops.Ops`
and calls `walk.decoder`; a quantiser produces `packed.PackedLinear`; a device opens a
`bundle.Bundle`.
"""
