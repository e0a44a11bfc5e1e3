"""Many engine cores behind a router, under one virtual clock."""
