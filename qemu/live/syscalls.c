/*
 * A rare system call with an argument to recognise, from user mode on one CPU, every 50 ms: sysinfo(0x5a5a5000).
 * Between two calls it is busy in user mode when asked to be ("busy" as the second argument), else asleep.
 */
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <time.h>

#include "planted.h"

#define BUFFER 0x5a5a5000ul
#define EVERY_MS 50

static long milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int main(int argc, char **argv)
{
	int cpu = argc > 1 ? atoi(argv[1]) : 0;
	int busy = argc > 2 && strcmp(argv[2], "busy") == 0;
	struct sysinfo *info = mmap((void *)BUFFER, 4096, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	CHECK(info == (void *)BUFFER);
	name_thread("kstub-sys");
	pin_to_cpu(cpu);
	CHECK(sysinfo(info) == 0);
	printf("pid=%d\ncpu=%d\nbuffer=0x%lx\n", getpid(), cpu, BUFFER);
	printf("totalram=%lu\nmem_unit=%u\n", info->totalram, info->mem_unit);
	planted();
	for (;;) {
		long until = milliseconds() + EVERY_MS;

		if (busy)
			while (milliseconds() < until)
				;
		else
			usleep(EVERY_MS * 1000);
		syscall(SYS_sysinfo, BUFFER);
	}
}
