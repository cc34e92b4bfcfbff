"""Events: from the worker into log and channel (`publisher`), from there to listeners (`relay`)."""
