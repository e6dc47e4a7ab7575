"""A model beside its reference on rows of its own kind: language models, classifiers, taggers, projectors."""
