"""Where images come from, which ones make up a step, how they look, and what is hidden."""
