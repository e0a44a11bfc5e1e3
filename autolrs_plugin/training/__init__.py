"""Obeys: runs the actions on a torch training job."""
