"""Model repositories that a Triton Inference Server serves. Needs the base install only.

artefact --repository--> REPOSITORY/NAME/config.pbtxt          configuration: text; batching: its queue
                                        labels.txt             a classifier's names
                                        1/model.py             calls `backend`
                                        1/artifact/            the artefact's copy
"""
