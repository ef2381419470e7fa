/* A task that goes from one CPU to another and back, every 50 ms, each time within sched_setaffinity(2). */
#include "planted.h"

#define EVERY_MS 50

int main(int argc, char **argv)
{
	int cpus[2] = { argc > 1 ? atoi(argv[1]) : 0, argc > 2 ? atoi(argv[2]) : 1 };

	name_thread("kstub-wander");
	pin_to_cpu(cpus[0]);
	printf("pid=%d\n", getpid());
	planted();
	for (int i = 1;; i = !i) {
		usleep(EVERY_MS * 1000);
		pin_to_cpu(cpus[i]);
	}
}
