"""A trained run as a service over HTTP: launch/serve.py.

batcher.py puts requests into batches for the two threads that search; model.py is a
recommender of fixed shapes, all of them compiled; service.py has the model in use, the one before,
and what happens at start, reload and end; schemas.py, app.py and guard.py are the interface;
server.py the process.
"""
