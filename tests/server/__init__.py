"""Check the server over real sockets, with the clients that people use."""
