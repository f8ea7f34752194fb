"""Installs the ops into other libraries' models, where asked to: nothing happens at import."""
