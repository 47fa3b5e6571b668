"""Replicas of a stage: contributions to rounds, and the links to the nodes of the same stage in other lanes."""
