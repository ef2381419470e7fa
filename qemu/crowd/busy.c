/*
 * Busy on one CPU for ever, in the real-time class where the priority is not 0.
 *
 *   busy CPU PRIORITY
 */
#include "../programs/planted.h"

int main(int argc, char **argv)
{
	struct sched_param how = { .sched_priority = argc == 3 ? atoi(argv[2]) : 0 };

	if (argc != 3) {
		fprintf(stderr, "usage: busy CPU PRIORITY\n");
		return 2;
	}
	pin_to_cpu(atoi(argv[1]));
	CHECK(sched_setscheduler(0, how.sched_priority ? SCHED_FIFO : SCHED_OTHER, &how) == 0);
	for (;;)
		;
}
