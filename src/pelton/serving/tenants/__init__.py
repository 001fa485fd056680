"""Keys, limits and usage of those who share the server. `service.py` joins the parts; `store/` keeps what they need.

Nothing here imports a database before a server has keys: `pelton.store` is imported in functions, its values aside.
"""
