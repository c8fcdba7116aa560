"""Meshes and rule tables: how names become places."""
