"""HTTP: the ASGI application, the reading of bodies, and the server (granian) that they run under."""
