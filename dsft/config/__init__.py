"""The config of a run: what can be set (`schema`), how it is read (`load`) and what must agree (`check`)."""
