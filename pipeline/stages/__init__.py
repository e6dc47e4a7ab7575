"""The stages: artifacts in, artifacts out. Each module has one public entry, run(job).

`run` yields an Output as soon as one is finished; whoever runs the stage commits it at once, so a kill between two
outputs loses only the second.
"""
