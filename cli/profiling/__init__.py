"""What `baton profile` is made of. Everything is watched from outside: nothing that serves knows of it."""
