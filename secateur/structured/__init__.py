"""Making a model narrower and shorter: what computes what is probed, and a config is believed once its model is built."""
