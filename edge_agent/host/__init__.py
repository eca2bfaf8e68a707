"""The model host: a child process that holds one model. The only room that imports numpy and a runtime."""
