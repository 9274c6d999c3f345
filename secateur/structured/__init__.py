"""Making a model narrower and shorter: what computes what is found by probing, and a config is believed once its model is built."""
