"""The training itself: batches, devices, the step, its fast engines, the loop."""
