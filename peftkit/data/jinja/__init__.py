"""Jinja templates of models and recipes: rendered safely, the unknown ones in a sandbox process."""
