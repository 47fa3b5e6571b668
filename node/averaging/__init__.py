"""Averaging: what the lanes of a run make of what each has learned.

A *lane* is a replica of the whole chain of stages with its own part of the data; a node is (stage, lane). Within a lane
everything is as in a run of one lane; the nodes of one stage in different lanes give each other *contributions* at
fixed steps, the *rounds*. `modes`: what a run may ask for. `round_plan`: when rounds are. `averager`: what a stage
contributes and what it makes of all contributions, for `gradients` and for `weights`. Only arithmetic is here; nothing
knows how contributions travel.
"""
