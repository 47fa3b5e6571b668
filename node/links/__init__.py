"""Connections to neighbours: listening and dialling, the tensors' stream with its link model, the control stream."""
