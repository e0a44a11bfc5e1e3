"""Real servers with a real model under load."""
