"""The devices room: enrolment, names, labels, certificates, presence and what devices report of themselves."""
