"""From packed to dense: what a checkpoint becomes, how it is written, and whether it still says the same."""
